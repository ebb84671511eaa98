# What the three scripts share. They source it inside a job, which starts in the checkout it was submitted from.

root=$PWD modules="" environment=$PWD/.venv scratch="" offline=yes
if [ -f slurm/site.env ]; then source slurm/site.env; fi
if [ -n "$modules" ]; then
  if ! type module > /dev/null 2>&1; then source /etc/profile.d/modules.sh || source /etc/profile.d/lmod.sh; fi
  module load $modules
fi
export PATH=$environment/bin:$PATH
if [ "$offline" = yes ]; then export WANDB_MODE=offline HF_HUB_OFFLINE=1; fi
if [ -n "$scratch" ]; then mkdir -p "$scratch" && cd "$scratch" || exit 2; fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun no longer takes it from sbatch
export PYTHONUNBUFFERED=1

# launch COMMAND ARG...: on every task; the script ends with its code. `%a` in an argument is the array's index.
# Stopped by SIGUSR1 (the limit is near) or SIGTERM (preempted), the command has saved: it is queued again and goes on.
launch() {
  local code process ended=${VGR_CHAIN:+$root/slurm/logs/$VGR_CHAIN.ended}
  if [ -n "$ended" ] && [ -f "$ended" ]; then
    echo "nothing left to do: job $(cat "$ended")"
    exit 0
  fi
  echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST, in $PWD:$(printf ' %q' "$@")"
  # A rank that died takes the others with it, but only after they had time to end by themselves (W&B's upload: 60 s).
  srun --kill-on-bad-exit=0 --wait=120 "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}" &
  process=$!
  trap 'kill -USR1 $process 2> /dev/null' USR1
  trap 'kill -TERM $process 2> /dev/null' TERM
  while true; do  # a signal ends `wait` before srun has ended
    wait "$process"
    code=$?
    kill -0 "$process" 2> /dev/null || break
  done
  case $code in
    0 | 3) if [ -n "$ended" ]; then echo "$SLURM_JOB_ID ended with code $code" > "$ended"; fi ;;
    138 | 143) again ;;
  esac
  exit "$code"
}

# Queue this job again, unless somebody cancelled it: then Slurm ends it, and not to give its place to another.
again() {
  local told
  sleep 2  # a SIGTERM to all of a job reaches this shell's children too, and some later than others
  told=$(scontrol --oneliner show job "$SLURM_JOB_ID")
  if [[ $told != *" JobState=RUNNING "* && $told != *" PreemptTime=2"* ]]; then
    echo "saved, and cancelled; the same command goes on"
  elif [ -n "${VGR_CHAIN:-}" ]; then
    echo "saved; the next job of the chain goes on"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "saved and queued again"
  else
    echo "saved, but not queued again: submit the same command, with chain=10 where requeue is forbidden" >&2
  fi
}
