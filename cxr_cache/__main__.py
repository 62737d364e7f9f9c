"""``python -m cxr_cache`` is ``cxr-cache``."""

from cxr_cache.cli.main import main

if __name__ == "__main__":
    main()
