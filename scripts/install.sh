# Sourced by quickstart.sh and test.sh: .venv with the pinned versions and the extras named in $1.
extras="$1"
stamp=".venv/installed-${extras:-base}"
if [ ! -e "$stamp" ] || [ -n "$(find constraints.txt setup.py pyproject.toml -newer "$stamp")" ]; then
  echo "installing the pinned versions into .venv (once)"
  [ -x .venv/bin/python ] || python3 -m venv .venv
  pin() { grep "^$1==" constraints.txt; }
  # torch first: the build of the package below sees it, and nothing pulls another torch in
  .venv/bin/pip install --quiet "$(pin setuptools)" "$(pin wheel)" "$(pin numpy)" "$(pin torch)"
  .venv/bin/pip install --quiet --constraint constraints.txt --no-build-isolation \
    --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi
