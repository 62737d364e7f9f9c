"""Files, tables, words, devices and places to compute: nothing about X-rays."""
