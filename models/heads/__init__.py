"""Detection heads: raw maps to boxes and scores.  Importing this package registers each."""

import importlib
import pkgutil

NAMES = sorted(item.name for item in pkgutil.iter_modules(__path__))
MODULES = [importlib.import_module(f"{__name__}.{name}") for name in NAMES]
