{{/* What the gateway needs in a cluster: endpoints from EndpointSlices, an own name and address for every replica. */}}
{{- define "millrace.settings.gateway" -}}
gateway_id: ${env:POD_NAME}
advertise_address: ${env:POD_NAME}.{{ include "millrace.componentName" (dict "root" . "name" "inference-gateway") }}.{{ .Release.Namespace }}.svc:7405
public_listen: 0.0.0.0:7400
stats_listen: 0.0.0.0:9091
{{- if ne .Values.gateway.tls.mode "none" }}
public_tls:
  mode: {{ .Values.gateway.tls.mode }}
  cert_file: /etc/millrace/public-tls/tls.crt
  key_file: /etc/millrace/public-tls/tls.key
  {{- if eq .Values.gateway.tls.mode "mutual" }}
  ca_file: /etc/millrace/public-tls/ca.crt
  {{- end }}
{{- end }}
{{- $auth := .Values.gateway.auth }}
auth:
  {{- if $auth.apiKeys }}
  api_keys_file: /etc/millrace/auth/api-keys
  {{- end }}
  {{- if $auth.jwt.enabled }}
  jwt:
    issuer: {{ required "gateway.auth.jwt.issuer: is needed" $auth.jwt.issuer | quote }}
    audiences: {{ $auth.jwt.audiences | toJson }}
    jwks_file: /etc/millrace/auth/jwks.json
  {{- end }}
  calls_per_s: {{ int $auth.callsPerSecond }}
  {{- if $auth.callsPerSecondOfEachClient }}
  each_client: {calls_per_s: {{ int $auth.callsPerSecondOfEachClient }}}
  {{- end }}
kubernetes:
  namespace: {{ .Release.Namespace }}
feature_address: {{ include "millrace.address" (dict "root" . "key" "feature") }}
rollout_address: {{ include "millrace.address" (dict "root" . "key" "rolloutController") }}
envoy:
  deregister_s: {{ .Values.gateway.shutdownDelaySeconds | default .Values.defaults.shutdownDelaySeconds }}
{{- end -}}
