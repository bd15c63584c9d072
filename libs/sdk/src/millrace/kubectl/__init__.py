"""`kubectl millrace`: ModelDeployments on a cluster. It only edits and watches that one resource; the controller does the rest."""
