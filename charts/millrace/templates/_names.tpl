{{/* Names and labels. Arguments are the root context, or a dict with `root` and the component's `name` (see _components.tpl). */}}

{{/* Prefix of every object: the release's name, with "millrace" in it. Short, because the longest suffix has 40 characters. */}}
{{- define "millrace.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains "millrace" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-millrace" (.Release.Name | trunc 31 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{/* Name of one component's objects. */}}
{{- define "millrace.componentName" -}}
{{- printf "%s-%s" (include "millrace.fullname" .root) .name -}}
{{- end -}}

{{/* What a selector may use: it never changes while a release lives. */}}
{{- define "millrace.selectorLabels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end -}}

{{/* Labels of every object of a component. */}}
{{- define "millrace.componentLabels" -}}
{{ include "millrace.selectorLabels" . }}
app.kubernetes.io/component: {{ .name }}
{{ include "millrace.releaseLabels" .root }}
{{- end -}}

{{/* Labels of objects that belong to the release as a whole. */}}
{{- define "millrace.labels" -}}
app.kubernetes.io/name: millrace
app.kubernetes.io/instance: {{ .Release.Name }}
{{ include "millrace.releaseLabels" . }}
{{- end -}}

{{- define "millrace.releaseLabels" -}}
app.kubernetes.io/part-of: millrace
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Service account of a component. */}}
{{- define "millrace.serviceAccountName" -}}
{{- include "millrace.componentName" . -}}
{{- end -}}

{{/* Address of a component's gRPC server inside the cluster, `host:port`. */}}
{{- define "millrace.address" -}}
{{- $component := get (include "millrace.components" .root | fromYaml) .key -}}
{{- printf "%s.%s.svc:%v" (include "millrace.componentName" (dict "root" .root "name" $component.name)) .root.Release.Namespace $component.port -}}
{{- end -}}

{{/* Image of a component: `root`, `image` (repository, tag, digest). */}}
{{- define "millrace.image" -}}
{{- $images := .root.Values.images -}}
{{- $name := .image.repository -}}
{{- if $images.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" $images.registry) $name }}{{ end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (.image.tag | default $images.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
