# shellcheck shell=bash
# Prepares a bash for the Ascend build: finds CANN, sources its set_env.sh and names the chip.
#
#   source scripts/init_cann.sh Ascend910B4
#
# Exports SOC_VERSION (for bisheng's --cce-soc-version) and CMAKE_ASC_ARCHITECTURES (for CMake's
# ASC language), and whatever set_env.sh exports. On an error it changes nothing.

# Prints the path of the set_env.sh to source.
_select_attn_find_set_env() {
  # What the environment names may be one version's folder, with set_env.sh beside it.
  local folder candidates=()
  for folder in "${ASCEND_HOME_PATH-}" "${ASCEND_TOOLKIT_HOME-}"; do
    if [ -n "$folder" ]; then candidates+=("$folder" "$(dirname "$folder")"); fi
  done
  for folder in /usr/local/Ascend "${HOME-}/Ascend"; do
    candidates+=("$folder/ascend-toolkit" "$folder/ascend-toolkit/latest" "$folder/cann")
  done
  for folder in "${candidates[@]}"; do
    if [ -f "$folder/set_env.sh" ]; then
      echo "$folder/set_env.sh"
      return 0
    fi
  done
  {
    echo "init_cann.sh: CANN was not found: no set_env.sh in"
    printf '  %s\n' "${candidates[@]}"
    echo "Install the CANN toolkit, or say where it is:"
    echo "  export ASCEND_HOME_PATH=<the folder with set_env.sh>"
  } >&2
  return 1
}

# Prefixed locals: set_env.sh runs in here, and its variables must neither change nor become these.
_select_attn_init_cann() {
  local sa_model=${1-} sa_cores sa_set_env sa_home sa_info sa_version sa_flags=$-
  case $sa_model in
    Ascend910B1) sa_cores=25 ;;
    Ascend910B2) sa_cores=24 ;;
    Ascend910B3 | Ascend910B4) sa_cores=20 ;;
    *)
      {
        if [ -z "$sa_model" ]; then
          echo "init_cann.sh: no model given"
        else
          echo "init_cann.sh: unknown model $sa_model"
        fi
        echo "known models: Ascend910B1 Ascend910B2 Ascend910B3 Ascend910B4"
        echo "usage: source scripts/init_cann.sh <model>"
      } >&2
      return 1
      ;;
  esac
  sa_set_env=$(_select_attn_find_set_env) || return 1

  # In a subshell first, so that a set_env.sh that fails half-way changes nothing here. Without -e
  # and -u, because vendors' scripts use unset variables and ignore failures; without arguments,
  # because set_env.sh would take the model for its own.
  set --
  # shellcheck source=/dev/null
  sa_home=$(
    set +eu
    source "$sa_set_env" >/dev/null 2>&1 && echo "${ASCEND_HOME_PATH-}"
  ) || sa_home=
  if [ -z "$sa_home" ]; then
    echo "init_cann.sh: $sa_set_env failed or did not set ASCEND_HOME_PATH" >&2
    return 1
  fi
  set +eu
  # shellcheck source=/dev/null
  source "$sa_set_env"
  case $sa_flags in *e*) set -e ;; esac
  case $sa_flags in *u*) set -u ;; esac

  export SOC_VERSION=$sa_model CMAKE_ASC_ARCHITECTURES=dav-2201
  sa_info=$ASCEND_HOME_PATH/$(uname -m)-linux/ascend_toolkit_install.info
  sa_version="of unknown version"
  if [ -f "$sa_info" ]; then sa_version=$(sed -n 's/^version=//p' "$sa_info"); fi
  echo "CANN $sa_version in $ASCEND_HOME_PATH"
  echo "$sa_model, $sa_cores AI cores: SOC_VERSION=$SOC_VERSION" \
    "CMAKE_ASC_ARCHITECTURES=$CMAKE_ASC_ARCHITECTURES"
}

if [ -z "${BASH_VERSION-}" ]; then
  echo "init_cann.sh: this needs bash" >&2
  unset -f _select_attn_find_set_env _select_attn_init_cann
  return 1
elif [ "${BASH_SOURCE[0]}" = "$0" ]; then
  echo "init_cann.sh: it changes the environment of your shell and must be sourced:" >&2
  echo "  source scripts/init_cann.sh <model>" >&2
  exit 1
elif _select_attn_init_cann "$@"; then
  unset -f _select_attn_find_set_env _select_attn_init_cann
else
  unset -f _select_attn_find_set_env _select_attn_init_cann
  return 1
fi
