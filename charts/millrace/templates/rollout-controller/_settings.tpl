{{/* What the rollout controller needs in a cluster: its state is in Kubernetes, its evidence comes from gateways and the drift monitor. */}}
{{- define "millrace.settings.rolloutController" -}}
{{- $name := include "millrace.componentName" (dict "root" . "name" "rollout-controller") -}}
{{- $values := include "millrace.componentValues" (dict "root" . "key" "rolloutController") | fromYaml -}}
{{- $servers := .Values.modelServers -}}
registry_address: {{ include "millrace.address" (dict "root" . "key" "registry") }}
drift_address: {{ include "millrace.address" (dict "root" . "key" "driftMonitor") }}
gateway_addresses: []
{{- if .Values.tls.enabled }}
# Gateways say the address of their pod; their certificates name the Service.
gateway_tls_name: {{ include "millrace.fullname" . }}-gateway
{{- end }}
max_deployments: 500
prometheus:
  url: {{ .Values.prometheus.url | quote }}
kubernetes:
  namespace: {{ .Release.Namespace }}
  pod_name: ${env:POD_NAME}
  routes_config_map: {{ include "millrace.fullname" . }}-routes
  lease:
    name: {{ $name }}
  servers:
    image: {{ $servers.image }}
    image_pull_policy: {{ .Values.images.pullPolicy }}
    image_pull_secrets: {{ .Values.images.pullSecrets | toJson }}
    {{- with $servers.command }}
    command: {{ . | toJson }}
    {{- end }}
    {{- with $servers.args }}
    args: {{ . | toJson }}
    {{- end }}
    platform: {{ $servers.platform }}
    env: {{ $servers.env | toJson }}
    resources: {{ $servers.resources | toJson }}
    node_selector: {{ $servers.nodeSelector | toJson }}
    tolerations: {{ $servers.tolerations | toJson }}
    affinity: {{ $servers.affinity | toJson }}
    topology_spread_constraints: {{ $servers.topologySpreadConstraints | toJson }}
    runtime_class_name: {{ $servers.runtimeClassName | quote }}
    priority_class_name: {{ $servers.priorityClassName | quote }}
    service_account_name: {{ include "millrace.fullname" . }}-model-server
    pod_labels: {{ $servers.podLabels | toJson }}
    pod_annotations: {{ $servers.podAnnotations | toJson }}
    gpu:
      runtime_class_name: {{ $servers.gpu.runtimeClassName | quote }}
      node_selector: {{ $servers.gpu.nodeSelector | toJson }}
      tolerations: {{ $servers.gpu.tolerations | toJson }}
      priority_class_name: {{ $servers.gpu.priorityClassName | quote }}
    startup_s: {{ int $servers.startSeconds }}
    pre_stop_s: {{ int $servers.preStopSeconds }}
    grace_s: {{ int $servers.graceSeconds }}
    shm_size: {{ $servers.shmSize }}
    model_volume_size: {{ $servers.modelVolumeSize }}
    warmup_requests: {{ int $servers.warmupRequests }}
    min_available: {{ int $servers.minAvailable }}
  fetch:
    image: {{ include "millrace.image" (dict "root" . "image" $values.image) }}
    config_map: {{ $name }}
    tls_secret: {{ ternary (printf "%s-model-server-tls" (include "millrace.fullname" .)) "" .Values.tls.enabled | quote }}
    resources: {{ $servers.fetchResources | toJson }}
    {{- if .Values.tls.enabled }}
    # Loaders answer at the address of their pod.
    loader_tls_name: model-server.{{ include "millrace.fullname" . }}.{{ .Release.Namespace }}
    controller_tls_name: {{ $name }}
    {{- end }}
{{- end -}}
