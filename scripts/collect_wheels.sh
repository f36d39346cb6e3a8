#!/usr/bin/env bash
# Collects wheels for a machine without a package index:
#
#   bash scripts/collect_wheels.sh DIR [LIST]
#   bash scripts/gpu_verify.sh --wheels DIR       # there
#
# They are what mmalign and the extra `gpu` of pyproject.toml need beyond PyTorch, its dependencies
# and NumPy, in the versions of constraints.txt, for Python 3.12 on x86-64. LIST is the output of
# `pip list` or `pip freeze` on that machine: what it has is left out.
#
# $PYTHON (.venv/bin/python, else python3) needs pip.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
folder="$1"
target=(--only-binary=:all: --python-version "${MMALIGN_WHEELS_PYTHON:-3.12}" --implementation cp)
for platform in manylinux_2_{39..17} manylinux2014 manylinux_2_12 manylinux2010 manylinux1; do
  target+=(--platform "${platform}_x86_64")  # pip takes the tags literally
done
reports="$(mktemp -d)"
trap 'rm -rf "$reports"' EXIT
resolve() {  # names and versions of packages with all that they need, without downloading them
  "$python" -m pip install --quiet --dry-run --ignore-installed --report "$reports/$1.json" \
    --target "$reports/none" --constraint constraints.txt "${target[@]}" "${@:2}"
}
mapfile -t wanted < <("$python" - <<'EOF'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["gpu"], sep="\n")
EOF
)
resolve all "${wanted[@]}"
resolve torch torch
mapfile -t missing < <("$python" - "$reports" "${2:-/dev/null}" <<'EOF'
import json
import re
import sys

reports, present = sys.argv[1:]


def packages(name):
    found = json.load(open(f"{reports}/{name}.json"))["install"]
    return {normal(x["metadata"]["name"]): x["metadata"]["version"] for x in found}


def normal(name):
    return re.sub("[-_.]+", "-", name).lower()


known = {normal(re.split(r"[\s=@]", line)[0]) for line in open(present)}
known |= packages("torch").keys() | {"triton", "numpy"}  # which images of PyTorch have, too
print(*(f"{x}=={v}" for x, v in packages("all").items() if x not in known), sep="\n")
EOF
)
mkdir -p "$folder"
[ -z "${missing[0]:-}" ] || "$python" -m pip download --quiet --no-deps "${target[@]}" \
  --dest "$folder" "${missing[@]}"
echo "$folder: ${missing[*]:-nothing is missing}"
