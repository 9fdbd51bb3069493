"""SAE files of other libraries, read and written: one module a library."""
