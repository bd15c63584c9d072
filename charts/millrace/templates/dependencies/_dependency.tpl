{{/*
One server of the dependencies profile: a StatefulSet of one pod with a claim, and its Service. Small real servers for a first try and for
tests; production points the values at servers that somebody operates.
Arguments: `root`, `key` (under `dependencies`), `name`, `user` (uid and gid), `ports` (map name → port), `container` (YAML of the main
container without name, image, ports, resources and security), `init` (YAML list of init containers, may be empty), `volumes` (YAML list).
*/}}
{{- define "millrace.dependency" -}}
{{- $root := .root -}}
{{- $values := get $root.Values.dependencies .key -}}
{{- $named := dict "root" $root "name" .name -}}
{{- $name := include "millrace.componentName" $named -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  labels:
    {{- include "millrace.componentLabels" $named | nindent 4 }}
spec:
  selector:
    {{- include "millrace.selectorLabels" $named | nindent 4 }}
  ports:
    {{- range $port, $number := .ports }}
    - {name: {{ $port }}, port: {{ $number }}, targetPort: {{ $port }}}
    {{- end }}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $name }}
  labels:
    {{- include "millrace.componentLabels" $named | nindent 4 }}
spec:
  replicas: 1
  revisionHistoryLimit: 5
  serviceName: {{ $name }}
  persistentVolumeClaimRetentionPolicy:
    whenDeleted: Retain
    whenScaled: Retain
  selector:
    matchLabels:
      {{- include "millrace.selectorLabels" $named | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "millrace.componentLabels" $named | nindent 8 }}
      annotations:
        checksum/settings: {{ printf "%s%s" .container .init | sha256sum }}
        {{- with .checksum }}
        checksum/config: {{ . }}
        {{- end }}
    spec:
      automountServiceAccountToken: false
      enableServiceLinks: false
      securityContext:
        runAsNonRoot: true
        runAsUser: {{ .user }}
        runAsGroup: {{ .user }}
        fsGroup: {{ .user }}
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile: {type: RuntimeDefault}
      {{- include "millrace.pullSecrets" $root | nindent 6 }}
      {{- include "millrace.placement" (dict "values" $values "named" $named) | nindent 6 }}
      terminationGracePeriodSeconds: 60
      {{- with .init }}
      initContainers:
        {{- . | nindent 8 }}
      {{- end }}
      containers:
        - name: {{ .name }}
          image: {{ $values.image }}
          imagePullPolicy: {{ $root.Values.images.pullPolicy }}
          {{- include "millrace.containerSecurity" $root | nindent 10 }}
          ports:
            {{- range $port, $number := .ports }}
            - {name: {{ $port }}, containerPort: {{ $number }}}
            {{- end }}
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          {{- .container | nindent 10 }}
      volumes:
        - name: tmp
          emptyDir: {sizeLimit: 256Mi}
        {{- if not $values.storage.enabled }}
        - name: data
          emptyDir: {sizeLimit: {{ $values.storage.size }}}
        {{- end }}
        {{- with .volumes }}
        {{- . | nindent 8 }}
        {{- end }}
  {{- if $values.storage.enabled }}
  volumeClaimTemplates:
    {{- include "millrace.claim" (dict "name" "data" "storage" $values.storage "labels" (include "millrace.selectorLabels" $named)) | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* A Secret's value as it is in the cluster (base64), or a new random one: `root`, `secret`, `key`, `length`. */}}
{{- define "millrace.kept" -}}
{{- $there := lookup "v1" "Secret" .root.Release.Namespace .secret | default dict -}}
{{- get ($there.data | default dict) .key | default (randAlphaNum (int .length) | b64enc) -}}
{{- end -}}
