"""The documentation site: `make docs` builds it offline, warnings are errors."""

import os
import sys
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # also for notebooks

import cm_diffusers


ROOT = Path(__file__).resolve().parents[1]
FLAGS = """# {name}.py

```{{argparse}}
:module: parsers
:func: {name}
:prog: {name}.py
```
"""
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "cm_diffusers"
author = "the authors of cm_diffusers"
copyright = "2026, the authors of cm_diffusers"
release = cm_diffusers.__version__
extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinxarg.ext",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "_templates"]
nitpicky = False

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_ref_domains = ["std", "py"]  # that of sphinx-argparse cannot be asked
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True
nb_output_stderr = "remove"

smartquotes_action = "q"  # a flag keeps its two dashes
default_role = "code"  # single backticks in docstrings
add_module_names = False
autosummary_generate = True
napoleon_use_ivar = True  # a field of a dataclass is described once, in its "Attributes"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_use_type_comments = False  # there are none, and to look for them takes a sixth of the time
autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    "special-members": "__call__",
    "show-inheritance": True,
}
templates_path = ["_templates"]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "cm_diffusers"
html_copy_source = False


def skip_member(app, what, name, member, skip, options) -> bool | None:
    """Leaves out what pipelines and schedulers inherit from diffusers, which documents it."""
    module = getattr(getattr(member, "fget", member), "__module__", None) or ""
    return True if module.split(".")[0] == "diffusers" else None


def write_flags(app) -> None:
    """A page for each training script; docs/api/flags.md says in which order."""
    folder = ROOT / "docs" / "api" / "generated" / "flags"
    folder.mkdir(parents=True, exist_ok=True)
    for script in sorted((ROOT / "training").glob("*.py")):
        (folder / f"{script.stem}.md").write_text(FLAGS.format(name=script.stem), "utf-8")


def setup(app) -> None:
    app.connect("builder-inited", write_flags)
    app.connect("autodoc-skip-member", skip_member)
