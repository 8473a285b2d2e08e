"""Model directories: the native format, and converters."""
