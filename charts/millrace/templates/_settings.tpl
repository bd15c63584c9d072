{{/*
The settings file of a service: what every service has, what this one needs in a cluster (`millrace.settings.<key>`, beside its
workload), and the user's `settings` over both. Arguments: `root`, `key`.
*/}}
{{- define "millrace.settings" -}}
{{- $values := include "millrace.componentValues" . | fromYaml -}}
{{- $common := include "millrace.commonSettings" . | fromYaml -}}
{{- $own := include (printf "millrace.settings.%s" .key) .root | fromYaml -}}
{{- if hasKey $own "Error" }}{{ fail (printf "%s: %s" .key $own.Error) }}{{ end -}}
{{- mergeOverwrite $common $own ($values.settings | default dict) | toYaml -}}
{{- end -}}

{{- define "millrace.commonSettings" -}}
{{- $component := get (include "millrace.components" .root | fromYaml) .key -}}
{{- $values := include "millrace.componentValues" . | fromYaml -}}
{{- if ne .key "console" }}
listen: 0.0.0.0:{{ $component.port }}
state_dir: /var/lib/millrace
drain_s: {{ $values.drainSeconds }}
shutdown_delay_s: {{ $values.shutdownDelaySeconds }}
# Behind a ClusterIP a gRPC client stays with one pod for as long as its connection lives. The controller's Service leads to its leader
# alone, and whoever is still connected to the one before has to notice soon; a watch under way stays.
max_connection_age_s: {{ ternary 5 300 (eq .key "rolloutController") }}
bus:
  {{- include "millrace.bus" (dict "root" .root "secured" (has "kafka" $component.uses)) | nindent 2 }}
{{- end }}
{{- if .root.Values.tls.enabled }}
tls:
  cert_file: /etc/millrace/tls/tls.crt
  key_file: /etc/millrace/tls/tls.key
  ca_file: /etc/millrace/tls/ca.crt
{{- end }}
telemetry:
  metrics_listen: 0.0.0.0:9090
  otlp_endpoint: {{ .root.Values.telemetry.otlpEndpoint | quote }}
  sample_ratio: {{ .root.Values.telemetry.sampleRatio }}
  log_level: {{ .root.Values.telemetry.logLevel }}
{{- end -}}

{{/* Settings of the bus: `root`, and whether the pod has the Secret with Kafka's credentials (`secured`). */}}
{{- define "millrace.bus" -}}
{{- $kafka := .root.Values.kafka -}}
kind: kafka
bootstrap_servers:
  {{- include "millrace.kafkaServers" .root | nindent 2 }}
partitions: {{ int $kafka.partitions }}
replication_factor: {{ include "millrace.kafkaReplicas" .root }}
create_topics: {{ $kafka.manageTopics }}
topic_configs:
  retention.ms: {{ mul (int $kafka.retentionHours) 3600000 | quote }}
{{- if and .secured (include "millrace.kafkaSecret" .root) }}
security:
  protocol: {{ $kafka.security.protocol }}
  check_hostname: {{ $kafka.security.checkHostname }}
  {{- if hasSuffix "SSL" $kafka.security.protocol }}
  {{- if $kafka.security.authority }}
  ca_file: /etc/millrace/kafka/ca.crt
  {{- end }}
  {{- if $kafka.security.clientCertificate }}
  cert_file: /etc/millrace/kafka/tls.crt
  key_file: /etc/millrace/kafka/tls.key
  {{- end }}
  {{- end }}
  {{- if hasPrefix "SASL" $kafka.security.protocol }}
  sasl_mechanism: {{ $kafka.security.saslMechanism }}
  username: ${file:/etc/millrace/kafka/username}
  password: ${file:/etc/millrace/kafka/password}
  {{- end }}
{{- else if and .secured (eq $kafka.security.protocol "SSL") (not (include "millrace.brings" (dict "root" .root "name" "kafka"))) }}
security:
  protocol: SSL
  check_hostname: {{ $kafka.security.checkHostname }}
{{- end }}
{{- end -}}

{{/* The dependencies profile has one broker. */}}
{{- define "millrace.kafkaReplicas" -}}
{{- if include "millrace.brings" (dict "root" . "name" "kafka") }}1{{ else }}{{ .Values.kafka.replicationFactor }}{{ end -}}
{{- end -}}

{{/* The ConfigMap with the settings file. */}}
{{- define "millrace.config" -}}
{{- $component := get (include "millrace.components" .root | fromYaml) .key -}}
{{- $named := dict "root" .root "name" $component.name -}}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "millrace.componentName" $named }}
  labels:
    {{- include "millrace.componentLabels" $named | nindent 4 }}
data:
  config.yaml: |
    {{- include "millrace.settings" . | nindent 4 }}
  {{- if and .root.Values.bootstrap.wait $component.uses }}
  wait.yaml: |
    {{- include "millrace.waitSettings" (dict "root" .root "component" $component) | nindent 4 }}
  {{- end }}
{{- end -}}
