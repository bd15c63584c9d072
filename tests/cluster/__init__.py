"""What must hold on a real cluster: the chart is installed from nothing, and every test talks to it as a user would."""
