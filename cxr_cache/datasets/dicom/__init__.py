"""DICOM files: their pixels, their headers as a data set, and ids without names."""
