{{/* What the drift monitor needs in a cluster: everything in PostgreSQL, references from the registry. */}}
{{- define "millrace.settings.driftMonitor" -}}
database_url: ${file:/etc/millrace/secrets/database-url}
registry_address: {{ include "millrace.address" (dict "root" . "key" "registry") }}
{{- end -}}
