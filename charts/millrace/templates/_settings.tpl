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
bus:
  kind: kafka
  bootstrap_servers:
    {{- include "millrace.kafkaServers" .root | nindent 4 }}
  partitions: {{ .root.Values.kafka.partitions }}
  replication_factor: {{ include "millrace.kafkaReplicas" .root }}
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
{{- end -}}
