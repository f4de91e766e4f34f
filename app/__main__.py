"""``python -m app``: serve the app, by default on the bundled demo model."""

import sys

try:
    from app.serve import main
except ModuleNotFoundError as error:  # the library can be had without what the app needs
    sys.exit(f'error: the app needs {error.name}, which is not installed; in a clone: pip install -e ".[app]"')

main()
