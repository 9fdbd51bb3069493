"""Dictionaries that come with the package, one folder each: data, found by `runtime.packaged` and imported by nothing, so
that no stage counts them as its code. The stages that read one depend on its content (`config.local_inputs`)."""
