{{/* What ingestion needs in a cluster: the lake in object storage, contracts and dead letters in PostgreSQL. */}}
{{- define "millrace.settings.ingestion" -}}
lake_url: {{ include "millrace.objectStorageUrl" (dict "root" . "use" "lake") }}
database_url: ${file:/etc/millrace/secrets/database-url}
{{- end -}}
