{{/* What the feature service needs in a cluster: definitions in PostgreSQL, online values in Redis, the lake and training sets in object storage. */}}
{{- define "millrace.settings.feature" -}}
lake_url: {{ include "millrace.objectStorageUrl" (dict "root" . "use" "lake") }}
training_sets_url: {{ include "millrace.objectStorageUrl" (dict "root" . "use" "training-sets") }}
database_url: ${file:/etc/millrace/secrets/database-url}
online_store:
  kind: redis
  redis:
    url: ${file:/etc/millrace/secrets/redis-url}
    {{- if and .Values.redis.authority (not (include "millrace.brings" (dict "root" . "name" "redis"))) }}
    ca_file: /etc/millrace/secrets/redis-ca.crt
    {{- end }}
    # Releases may share a database.
    prefix: "{{ .Release.Namespace }}/{{ .Release.Name }}:feature:"
set_pins:
  ingestion_address: {{ include "millrace.address" (dict "root" . "key" "ingestion") }}
  keep_days: {{ int .Values.feature.trainingSets.keepVersionsDays }}
# Where inference gateways ask, for less than gRPC costs.
reads_listen: 0.0.0.0:7408
{{- with .Values.feature }}
feast:
  # Feast's own port.
  http_listen: {{ ternary "0.0.0.0:6566" "" .feast.http | quote }}
  grpc: {{ .feast.grpc }}
read_behind_s: {{ mul (int .history.readBehindHours) 3600 }}
head_behind_s: {{ int .history.headBehindSeconds }}
previous_kept_s: {{ int .history.previousDefinitionsSeconds }}
online_cache:
  max_staleness_ms: {{ int .onlineCache.maxStalenessMs }}
  max_entries: {{ int .onlineCache.maxEntries }}
  views: {{ .onlineCache.views | toJson }}
vector_search:
  max_memory_mib: {{ int .vectorSearch.maxMemoryMib }}
  max_concurrent: {{ int .vectorSearch.maxConcurrent }}
consistency:
  sample_rate: {{ .consistency.sampleRate }}
  settle_s: {{ .consistency.settleSeconds }}
  tolerance: {{ .consistency.tolerance }}
max_training_rows: {{ int64 .trainingSets.maxRows }}
build_memory_mib: {{ int .trainingSets.memoryMib }}
build_threads: {{ int .trainingSets.threads }}
max_builds: {{ int .trainingSets.maxConcurrent }}
access:
  administrators: {{ .access.administrators | toJson }}
  roles: {{ .access.roles | toJson }}
{{- end }}
{{- end -}}
