#!/usr/bin/env bash
# submitit 1.5.4: a job whose function ends by sys.exit(0) counts as failed.
#
# One expects what every launcher does: exit code 0 is success, as of a command line's `sys.exit(main())`. submitit writes the
# result only when the function returns. So the log says nothing of an error, the job's state is FINISHED, and `result()`
# raises UncompletedJobError, "has not produced any output". A task must return where it succeeds, and exit otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet submitit==1.5.4 cloudpickle==3.1.2
cat > "$folder/job.py" << 'PYTHON'
import sys
import submitit

executor = submitit.LocalExecutor(folder=sys.argv[1])
executor.update_parameters(timeout_min=1)
print("submitit", submitit.__version__)
returned, exited = executor.submit(int, 0), executor.submit(sys.exit, 0)
print("returns:", returned.result())
try:
    print("exits with 0:", exited.result())
except submitit.core.utils.UncompletedJobError as error:
    print("exits with 0: UncompletedJobError:", "has not produced any output (state: FINISHED)" in str(error))
PYTHON
seen=$(cd "$folder" && venv/bin/python job.py "$folder/jobs")
echo "$seen"
[ "$seen" = "submitit 1.5.4
returns: 0
exits with 0: UncompletedJobError: True" ]
