#!/usr/bin/env bash
# Installs a wheel in an empty environment and uses it from an empty folder: tests/outside/use_wheel.sh dist/NAME.whl
# PYTHON names the interpreter. Nothing is left behind.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
wheel=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'echo "use_wheel: line $LINENO failed: $BASH_COMMAND" >&2' ERR

"${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet -c "$root/constraints.txt" "${wheel}[train]"

unset PYTHONPATH
export PATH="$work/env/bin:$PATH" HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$work/modules" ACCELERATE_USE_CPU=1 TQDM_DISABLE=1
mkdir "$work/empty"
cd "$work/empty"

echo "use_wheel: the package and a script's help"
python -c "import cm_diffusers, sys; assert cm_diffusers.__file__.startswith(sys.prefix), cm_diffusers.__file__"
python -m cm_diffusers.training.distill_lcm --help | grep --quiet -e --pretrained_teacher_model

echo "use_wheel: a recipe by its name, as far as it goes without the Hub"
if accelerate launch -m cm_diffusers.training.distill_lcm --recipe lcm_sd15 2> said; then false; fi
grep --quiet --fixed-strings 'pip install "cm_diffusers[bnb]"' said || { cat said >&2; false; }
data=$root/assets/fashion_captioned/train
if accelerate launch -m cm_diffusers.training.distill_lcm --recipe lcm_sd15 --optimizer adamw --train_data_dir "$data" 2> said
then false; fi
grep --quiet "^error: .*stable-diffusion-v1-5.* nor a Hub id within reach" said || { cat said >&2; false; }

echo "use_wheel: two steps of a distillation"
accelerate launch -m cm_diffusers.training.distill_lcm --recipe lcm_demo \
    --pretrained_teacher_model "$root/assets/fashion_teacher" --train_data_dir "$data" \
    --output_dir run --latent_cache_dir cache --max_train_samples 32 --train_batch_size 4 --max_train_steps 2 --lr_warmup_steps 0 \
    --lr_cooldown_steps 0
grep --quiet '"command": "python -m cm_diffusers.training.distill_lcm ' run/pipeline/training.json
if grep --quiet --fixed-strings -e "$root" -e "$work" run/pipeline/training.json run/pipeline/README.md; then false; fi

echo "use_wheel: a sample by a single file of the package, which then travels beside the weights"
python - << 'END'
from importlib.resources import files

from diffusers import DiffusionPipeline

file = files("cm_diffusers") / "single_files" / "consistency_text_to_image.py"
pipe = DiffusionPipeline.from_pretrained("run/pipeline", custom_pipeline=str(file), trust_remote_code=True)
assert pipe("a photo of a bag", num_inference_steps=1).images[0].size == (32, 32)
END
python -m cm_diffusers.training.share --folder run/pipeline --pipeline_file consistency_text_to_image.py
test -s run/pipeline/pipeline.py
echo "use_wheel: all of it works"
