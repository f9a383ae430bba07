#!/usr/bin/env bash
# The main job on one machine, from nothing: environment, data, pre-training, evaluation, report. About 10 minutes on
# two CPU cores. Run it again to resume, or to be told that it is done. RUN=DIR chooses the folder (default runs/local).
# Further arguments go to `cloc train`, e.g. --config.train.total_steps=200.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
RUN="${RUN:-runs/local}"
CLOC=.venv/bin/cloc

if [ ! -e "$RUN/scenes/dataset_info.json" ]; then
  echo "Drawing the embedded data set …"
  "$CLOC" data scenes --preset local --size 72 --out "$RUN/scenes" --train "${SCENES:-50000}" --val 1000 --unseen 1000 --overwrite
  "$CLOC" data inspect "$RUN/scenes" --out "$RUN/scenes.html" --image-size 72
fi
exec "$CLOC" train --config configs/scenes_local.py --workdir "$RUN" --config.data.path="$RUN/scenes" --report "$@"
