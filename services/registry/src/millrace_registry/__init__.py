"""Models, versions, lifecycle, approvals, lineage and artifacts."""
