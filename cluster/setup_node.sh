#!/usr/bin/env bash
# Makes a machine ready for a study: mmm4rec and what it needs in ~/mmm4rec-venv, and the environment that every shell
# there gets. `ray up` runs it on every node; run again, it installs only what has changed.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
venv=$HOME/mmm4rec-venv
python=${MMM4REC_PYTHON:-python3}

[ -f "$repository/pyproject.toml" ] || {
    echo "error: $repository holds no pyproject.toml. file_mounts takes the folder that \`ray up\` is run in: run it in the repository's root." >&2
    exit 2
}
[ -s "$HOME/.ray/auth_token" ] || {
    echo "error: ~/.ray/auth_token is missing. Make it once, where you run \`ray up\`: ray get-auth-token --generate > /dev/null" >&2
    exit 2
}
chmod 600 "$HOME/.ray/auth_token"

wanted=$(cat "$repository/pyproject.toml" "$repository/cluster/constraints.txt" | sha256sum)
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: mmm4rec needs Python 3.11 or newer; $python is older. Set MMM4REC_PYTHON in setup_commands." >&2
        exit 2
    }
    "$python" -m venv "$venv"
    # one command: installed after ray, mlflow would move pyarrow back
    "$venv/bin/python" -m pip install --quiet --constraint "$repository/cluster/constraints.txt" --editable "$repository[studies]"
    printf '%s\n' "$wanted" >"$venv/installed"
fi

cat >"$HOME/.mmm4rec.sh" <<'SHELL'
export PATH="$HOME/mmm4rec-venv/bin:$PATH"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
if [ -f "$HOME/.mmm4rec_secrets.sh" ]; then . "$HOME/.mmm4rec_secrets.sh"; fi
SHELL
touch "$HOME/.bashrc"
grep -qxF '. ~/.mmm4rec.sh' "$HOME/.bashrc" || echo '. ~/.mmm4rec.sh' >>"$HOME/.bashrc"
