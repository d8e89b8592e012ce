"""How an app ends, as launchers, SLURM and Kubernetes read it: what to do with the job."""

DONE = 0
RETRY = 1  # a crash, a lost process, a machine that did not come: as any status that is not named here
FAILED = 2  # for good: bad input, a diverged run; another try would end the same way
PREEMPTED = 42  # saved and stopped by a signal: start it again, and it goes on
