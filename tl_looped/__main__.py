"""`python -m tl_looped` is `tl-looped`."""

from tl_looped.report.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
