"""`python -m millrace_rollout_controller.tuning`."""

from millrace_rollout_controller.tuning.command import main

main()
