"""SAEs of your own: one class a file, named in `comparison_saes.python` as `custom_saes.FILE:CLASS`."""
