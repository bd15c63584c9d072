{{/* What the registry needs in a cluster: models in PostgreSQL, artifacts in object storage. */}}
{{- define "millrace.settings.registry" -}}
database_url: ${file:/etc/millrace/secrets/database-url}
artifacts_url: {{ include "millrace.objectStorageUrl" (dict "root" . "use" "artifacts") }}
{{- end -}}
