"""Pixels of files that are no DICOM, decoded and shrunk faster than Pillow does, and to the bit."""
