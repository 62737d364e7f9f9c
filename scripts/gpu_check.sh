#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under 8 minutes; options are those of gpu_check.py.
#
#     scripts/gpu_check.sh [--quick] [--device cpu] [--budget SECONDS] [--sections NAME,NAME]
#
# For a bare machine that has torch: wheels in .whl/ are installed to /tmp/site, the package is
# taken from this folder. Writes gpu_check.json to $OUT, or else to a folder of benchmarks/ that is
# named by the GPU; the status is 1 if anything failed.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if compgen -G '.whl/*.whl' >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target /tmp/site .whl/*.whl
    export PYTHONPATH=/tmp/site:$PYTHONPATH
fi

"$python" - <<'EOF'
import importlib

distributions = {
    "PIL": "Pillow", "click": "click", "h5py": "h5py", "jinja2": "jinja2", "joblib": "joblib",
    "huggingface_hub": "huggingface-hub hf-xet", "matplotlib": "matplotlib contourpy cycler",
    "numpy": "numpy", "open_clip": "open-clip-torch ftfy regex wcwidth", "packaging": "packaging",
    "pandas": "pandas python-dateutil six", "safetensors": "safetensors", "scipy": "scipy",
    "sklearn": "scikit-learn", "threadpoolctl": "threadpoolctl", "timm": "timm", "torch": "torch",
    "torchvision": "torchvision", "tqdm": "tqdm", "xxhash": "xxhash", "yaml": "PyYAML",
}  # fmt: skip
missing = {}
for module in distributions:
    try:
        importlib.import_module(module)
    except Exception as error:  # an ImportError, or whatever a wheel of the wrong kind does
        missing[module] = f"{type(error).__name__}: {error}"
if missing:
    wanted = " ".join(distributions[module] for module in missing)
    reasons = "; ".join(f"{module} ({reason})" for module, reason in missing.items())
    raise SystemExit(
        f"Cannot import {reasons}. Bring wheels: python3 -m pip download --no-deps "
        f"--only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 "
        f"--platform manylinux2014_x86_64 -d .whl {wanted}"
    )
EOF

exec "$python" scripts/gpu_check.py "$@"
