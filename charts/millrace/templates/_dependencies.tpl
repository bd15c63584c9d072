{{/* Where Kafka, PostgreSQL, Redis and object storage are: the chart's own small ones, or the user's. */}}

{{/* "true" when the chart brings this dependency: `root`, `name` (key under `dependencies`). */}}
{{- define "millrace.brings" -}}
{{- if and .root.Values.dependencies.enabled (get .root.Values.dependencies .name).enabled -}}true{{- end -}}
{{- end -}}

{{- define "millrace.kafkaServers" -}}
{{- if include "millrace.brings" (dict "root" . "name" "kafka") -}}
{{- list (printf "%s-kafka.%s.svc:9092" (include "millrace.fullname" .) .Release.Namespace) | toYaml -}}
{{- else -}}
{{- if not .Values.kafka.bootstrapServers }}{{ fail "kafka.bootstrapServers: is needed, for example [kafka:9092], unless dependencies.enabled brings a broker" }}{{ end -}}
{{- .Values.kafka.bootstrapServers | toYaml -}}
{{- end -}}
{{- end -}}

{{/* Secret with Kafka's credentials and certificates; empty without. */}}
{{- define "millrace.kafkaSecret" -}}
{{- $security := .Values.kafka.security -}}
{{- if and (ne $security.protocol "PLAINTEXT") (not (include "millrace.brings" (dict "root" . "name" "kafka"))) -}}
{{- if or (hasPrefix "SASL" $security.protocol) $security.authority $security.clientCertificate -}}
{{- required "kafka.security.existingSecret: is needed for kafka.security.protocol" $security.existingSecret -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Secret whose keys are the services' names and whose values are SQLAlchemy URLs. */}}
{{- define "millrace.postgresSecret" -}}
{{- if include "millrace.brings" (dict "root" . "name" "postgres") -}}
{{- include "millrace.fullname" . }}-postgres
{{- else -}}
{{- required "postgres.existingSecret: is needed (a Secret with one database URL per service), unless dependencies.enabled brings a server" .Values.postgres.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* Secret whose key `url` is the Redis URL. */}}
{{- define "millrace.redisSecret" -}}
{{- if include "millrace.brings" (dict "root" . "name" "redis") -}}
{{- include "millrace.fullname" . }}-redis
{{- else -}}
{{- required "redis.existingSecret: is needed (a Secret with the key url), unless dependencies.enabled brings a server" .Values.redis.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* Secret whose keys are environment variables of the object storage's clients; empty when pods have an identity of their own. */}}
{{- define "millrace.objectStorageSecret" -}}
{{- if include "millrace.brings" (dict "root" . "name" "objectStorage") -}}
{{- include "millrace.fullname" . }}-object-storage
{{- else -}}
{{- .Values.objectStorage.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* Endpoint of the object storage; empty is the cloud's own for the region. */}}
{{- define "millrace.objectStorageEndpoint" -}}
{{- if include "millrace.brings" (dict "root" . "name" "objectStorage") -}}
{{- printf "http://%s-object-storage.%s.svc:7070" (include "millrace.fullname" .) .Release.Namespace -}}
{{- else -}}
{{- .Values.objectStorage.endpoint -}}
{{- end -}}
{{- end -}}

{{/* URL of one use of the bucket: `root`, `use`. */}}
{{- define "millrace.objectStorageUrl" -}}
{{- $bucket := required "objectStorage.bucket: is needed" .root.Values.objectStorage.bucket -}}
{{- $prefix := .root.Values.objectStorage.prefix | trimAll "/" -}}
{{- printf "s3://%s/%s%s" $bucket (ternary "" (printf "%s/" $prefix) (empty $prefix)) .use -}}
{{- end -}}

{{/* Environment of the object storage's clients, read by delta-rs and by botocore alike; a map. */}}
{{- define "millrace.objectStorageVariables" -}}
AWS_REGION: {{ .Values.objectStorage.region | quote }}
AWS_DEFAULT_REGION: {{ .Values.objectStorage.region | quote }}
{{- with include "millrace.objectStorageEndpoint" . }}
AWS_ENDPOINT_URL: {{ . | quote }}
{{- if hasPrefix "http://" . }}
AWS_ALLOW_HTTP: "true"
{{- end }}
{{- end }}
{{- end -}}
