"""Where numba keeps compiled code: with the other caches, not beside the source. Import before numba, which reads the
setting when it is imported."""

from __future__ import annotations

import os

from sae_research.store import cache_dir

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir("numba")))
