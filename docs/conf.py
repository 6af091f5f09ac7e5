"""The documentation site: `make docs` builds it offline, warnings are errors."""

import os
import sys
from pathlib import Path

import cm_diffusers


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ["HF_HUB_OFFLINE"] = "1"  # for the notebook
os.environ["TQDM_DISABLE"] = "1"

project = "cm_diffusers"
author = "the authors of cm_diffusers"
copyright = "2026, the authors of cm_diffusers"
release = cm_diffusers.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinxarg.ext",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

default_role = "code"  # single backticks in docstrings
add_module_names = False
autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
templates_path = ["_templates"]

html_theme = "furo"
html_title = "cm_diffusers"
html_copy_source = False
