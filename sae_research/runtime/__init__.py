"""What every stage stands on: errors, files, caches, stage folders, sources, endpoints. Imports no torch."""
