"""ModelDeployments: rollouts by gates."""
