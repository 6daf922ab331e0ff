# The options of every run.sh. Set the defaults of stage, stop_stage, recipe, corpora, data, exp and usage, then source it: . ../shared/parse_options.sh
# It reads "$@" of the script and leaves the overrides of the recipe, ready to pass on, in the array `overrides`.

overrides=()

_print_usage() {
  cat <<USAGE
usage: $0 [--stage N] [--stop-stage M] [--recipe FILE] [--corpora FILE] [--data DIR] [--exp DIR] [--set a.b=c ...]

$usage

  --stage N        first stage (default: $stage)
  --stop-stage M   last stage (default: $stop_stage)
  --recipe FILE    what is trained (default: $recipe)
  --corpora FILE   on what (default: $corpora)
  --data DIR       teachers, manifests, features, quantizers, tokens, shards (default: $data)
  --exp DIR        checkpoints, export, evaluation (default: $exp)
  --set a.b=c      override one key of the recipe; repeatable
USAGE
}

_wrong_usage() {
  echo "$0: error: $1 (see $0 --help)" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  _option=$1
  case $_option in
    --help | -h)
      _print_usage
      exit 0
      ;;
    --stage | --stop-stage | --recipe | --corpora | --data | --exp | --set)
      [ $# -ge 2 ] || _wrong_usage "$_option needs a value"
      _value=$2
      shift 2
      ;;
    --stage=* | --stop-stage=* | --recipe=* | --corpora=* | --data=* | --exp=* | --set=*)
      _value=${_option#*=}
      _option=${_option%%=*}
      shift
      ;;
    *) _wrong_usage "unknown option $_option" ;;
  esac
  case $_option in
    --stage | --stop-stage)
      [[ $_value =~ ^-?[0-9]+$ ]] || _wrong_usage "$_option must be a whole number, but is '$_value'"
      ;;
    --set)
      [[ $_value == *?=* ]] || _wrong_usage "--set must look like a.b=c, but is '$_value'"
      ;;
    *)
      [ -n "$_value" ] || _wrong_usage "$_option must not be empty"
      ;;
  esac
  case $_option in
    --stage) stage=$_value ;;
    --stop-stage) stop_stage=$_value ;;
    --recipe) recipe=$_value ;;
    --corpora) corpora=$_value ;;
    --data) data=$_value ;;
    --exp) exp=$_value ;;
    --set) overrides+=(--set "$_value") ;;
  esac
done

[ "$stage" -le "$stop_stage" ] || _wrong_usage "--stage must not be after --stop-stage, but $stage is after $stop_stage"
