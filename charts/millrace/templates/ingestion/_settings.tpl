{{/* What ingestion needs in a cluster: the lake in object storage, contracts and dead letters in PostgreSQL. */}}
{{- define "millrace.settings.ingestion" -}}
lake_url: {{ include "millrace.objectStorageUrl" (dict "root" . "use" "lake") }}
database_url: ${file:/etc/millrace/secrets/database-url}
{{- with .Values.ingestion }}
vacuum_retention_h: {{ int .lake.vacuumRetentionHours }}
maintenance_every_s: {{ .lake.maintenanceEverySeconds }}
z_order: {{ .lake.order }}
dead_letter_retention_days: {{ .deadLetters.retentionDays }}
dead_letter_retention_count: {{ int64 .deadLetters.retentionCount }}
source_connections: {{ .sources.connections | toJson }}
source_inline_brokers: {{ .sources.inlineBrokers }}
source_locations: {{ .sources.locations | toJson }}
{{- end }}
{{- end -}}
