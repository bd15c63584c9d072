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
    client_claim: {{ $auth.jwt.clientClaim | quote }}
    groups_claim: {{ $auth.jwt.groupsClaim | quote }}
    {{- if $auth.jwt.discovery.enabled }}
    oidc:
      {{- if $auth.jwt.discovery.authority }}
      ca_file: /etc/millrace/auth/issuer-ca.crt
      {{- end }}
      refresh_s: {{ $auth.jwt.discovery.refreshSeconds }}
      max_age_s: {{ int64 $auth.jwt.discovery.maxAgeSeconds }}
    {{- else }}
    jwks_file: /etc/millrace/auth/jwks.json
    {{- end }}
  {{- end }}
  calls_per_s: {{ int $auth.callsPerSecond }}
  {{- if $auth.callsPerSecondOfEachClient }}
  each_client: {calls_per_s: {{ int $auth.callsPerSecondOfEachClient }}}
  {{- end }}
  {{- with $auth.callsPerSecondOfClients }}
  clients:
    {{- range $name, $calls := . }}
    {{ $name | quote }}: {calls_per_s: {{ int $calls }}}
    {{- end }}
  {{- end }}
kubernetes:
  namespace: {{ .Release.Namespace }}
  prefer_own_zone: {{ .Values.gateway.balancing.preferOwnZone }}
feature_address: {{ include "millrace.address" (dict "root" . "key" "feature") }}
feature_reads_address: {{ regexReplaceAll ":[0-9]+$" (include "millrace.address" (dict "root" . "key" "feature")) ":7408" }}
rollout_address: {{ include "millrace.address" (dict "root" . "key" "rolloutController") }}
{{- $gateway := .Values.gateway }}
predict_timeout_s: {{ $gateway.predict.timeoutSeconds }}
feature_time_share: {{ $gateway.predict.featureTimeShare }}
result_cache_entries: {{ int $gateway.predict.resultCacheEntries }}
max_zero_hop_clients: {{ int $gateway.zeroHop.maxClients }}
prediction_log:
  sample_ratio: {{ $gateway.predictionLog.sampleRatio }}
  samples_per_s: {{ int $gateway.predictionLog.samplesPerSecond }}
envoy:
  max_requests: {{ int $gateway.limits.maxRequests }}
  max_pending_requests: {{ int $gateway.limits.maxPendingRequests }}
  low_priority_percent: {{ $gateway.limits.lowPriorityPercent }}
  retry_after_s: {{ $gateway.limits.retryAfterSeconds }}
  max_memory_mib: {{ int $gateway.limits.maxMemoryMib }}
  max_client_connections: {{ int $gateway.limits.maxClientConnections }}
  {{- with $gateway.limits.adaptive }}
  {{- if .enabled }}
  adaptive:
    models: {{ .models | toJson }}
    tolerance_percent: {{ .tolerancePercent }}
    min_requests: {{ int .minRequests }}
    measure_s: {{ .measureSeconds }}
  {{- end }}
  {{- end }}
  slow_start_s: {{ $gateway.balancing.slowStartSeconds }}
  max_retries: {{ int $gateway.balancing.maxRetries }}
  retry_budget_percent: {{ $gateway.balancing.retryBudgetPercent }}
  deregister_s: {{ .Values.gateway.shutdownDelaySeconds | default .Values.defaults.shutdownDelaySeconds }}
{{- end -}}
