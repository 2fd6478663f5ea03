{{- define "sglang-alloc.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "sglang-alloc.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "sglang-alloc.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "sglang-alloc.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "sglang-alloc.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sglang-alloc.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Without versions: a new chart that changes nothing in the pod must not reload the model. */}}
{{- define "sglang-alloc.podLabels" -}}
{{ include "sglang-alloc.selectorLabels" . }}
app.kubernetes.io/component: inference-server
app.kubernetes.io/part-of: sglang-alloc
{{- end }}

{{- define "sglang-alloc.labels" -}}
{{ include "sglang-alloc.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "sglang-alloc.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "sglang-alloc.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "sglang-alloc.image" -}}
{{- printf "%s:%s" .image.repository (default .appVersion .image.tag) }}
{{- end }}

{{- define "sglang-alloc.budgetTablesVolume" -}}
{{- default (dict "configMap" (dict "name" (printf "%s-budget-tables" (include "sglang-alloc.fullname" .)))) .Values.budgetTables.volume | toYaml }}
{{- end }}

{{/* The one path at which publisher, controller and SGLang see the shared table. */}}
{{- define "sglang-alloc.tablePath" -}}
{{- printf "%s/%s" .Values.sharedTable.mountPath .Values.sharedTable.fileName }}
{{- end }}

{{- define "sglang-alloc.controlTokenFolder" -}}
/run/secrets/sglang-alloc
{{- end }}

{{- define "sglang-alloc.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
