{{/* What the feature service needs in a cluster: definitions in PostgreSQL, online values in Redis, the lake and training sets in object storage. */}}
{{- define "millrace.settings.feature" -}}
lake_url: {{ include "millrace.objectStorageUrl" (dict "root" . "use" "lake") }}
training_sets_url: {{ include "millrace.objectStorageUrl" (dict "root" . "use" "training-sets") }}
database_url: ${file:/etc/millrace/secrets/database-url}
online_store:
  kind: redis
  redis:
    url: ${file:/etc/millrace/secrets/redis-url}
    # Releases may share a database.
    prefix: "{{ .Release.Namespace }}/{{ .Release.Name }}:feature:"
feast:
  # Feast's own port.
  http_listen: 0.0.0.0:6566
vector_search:
  max_memory_mib: {{ int .Values.feature.vectorSearch.maxMemoryMib }}
  max_concurrent: {{ int .Values.feature.vectorSearch.maxConcurrent }}
build_memory_mib: 1024
build_threads: 1
{{- end -}}
