{# The job of `ccmim submit`, filled in by slurm.py (jinja2). The blocks `before` and `after` stand in submitit's job, too. -#}
#!/bin/bash
# A pretraining run of ccmim_fast: each task is a rank.
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ job.nodes }}
#SBATCH --ntasks-per-node={{ job.gpus_per_node }}
#SBATCH --gpus-per-node={{ job.gpus_per_node }}
#SBATCH --cpus-per-task={{ job.cpus_per_gpu }}
#SBATCH --time={{ job.time }}
{% if job.partition %}
#SBATCH --partition={{ job.partition }}
{% endif %}
{% if job.account %}
#SBATCH --account={{ job.account }}
{% endif %}
# {{ notice }} seconds before its time ends every rank gets USR1: it saves, and ends with exit code 143.
#SBATCH --signal=USR1@{{ notice }}
#SBATCH --output={{ name }}-%j.out
#SBATCH --open-mode=append
#SBATCH --{{ "" if job.requeue else "no-" }}requeue

export PATH={{ bin }}:"$PATH"
# The ranks meet on the first node, at a port below 32768, where Linux begins to hand out ports.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
{% block before %}
# What the run said last: `stopped` of an earlier start is no reason to start again.
state={{ state }}
before=$(cat "$state" 2>/dev/null)
{% endblock %}

rank='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
exec python -m ccmim_fast.cli pretrain "$@"'
# Since version 22.05 srun does not take cpus-per-task over from sbatch.
srun --kill-on-bad-exit=1 --cpus-per-task={{ job.cpus_per_gpu }} bash -c "$rank" rank {{ settings }}
{% block after %}
code=$?
{% if job.requeue %}
# Slurm by itself queues a job again after a node's failure, not when its time ends.
now=$(cat "$state" 2>/dev/null)
if [ "$now" != "$before" ] && grep -q '"state": "stopped"' <<< "$now"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
{% endif %}
exit $code
{% endblock %}
