# Sourced by the scripts beside it: makes .venv if missing and installs tgi into it.
# usage: ensure_venv EXTRAS   ("" or "[dev]"); needs the working directory at the repository root.

say() { printf '%s\n' "$*" >&2; }

fail() { # fail SENTENCE HINT
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer was found" "install one, for example with your distribution's package manager"
}

ensure_venv() {
  local extras=$1 stamp=.venv/.tgi-installed project installed
  if [ ! -x .venv/bin/python ]; then
    say "creating .venv"
    "$(find_python)" -m venv .venv ||
      fail "could not create a virtual environment in .venv" "on Debian and Ubuntu: apt install python3-venv"
  fi
  # A stamp of what was installed makes the second run start at once.
  project=$(cksum <pyproject.toml)
  installed=$(cat "$stamp" 2>/dev/null || true)
  # [dev] contains everything the plain install has.
  if [ "$installed" != "$extras $project" ] && [ "$installed" != "[dev] $project" ]; then
    say "installing tgi$extras into .venv (the first time this takes a minute or two)"
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --editable ".$extras" >&2 ||
      fail "installing tgi into .venv failed" "the lines above say why; no network? a full disk?"
    printf '%s' "$extras $project" >"$stamp"
  fi
}
