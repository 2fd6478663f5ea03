{{/*
The controller's configuration file: controller.config plus what only the chart knows.
A null in the values removes a key on its way here; the two SLOs must be said, so it is put back.
*/}}
{{- define "sglang-alloc.controllerConfig" -}}
{{- $config := deepCopy .Values.controller.config }}
{{- $slo := dict "ttft_seconds" nil "itl_seconds" nil | merge (default dict $config.slo) }}
{{- include "sglang-alloc.requireEdge" (dict "slo" "ttft_seconds" "value" $slo.ttft_seconds "name" "ttftBucketsSeconds" "edges" .Values.sglang.ttftBucketsSeconds) }}
{{- include "sglang-alloc.requireEdge" (dict "slo" "itl_seconds" "value" $slo.itl_seconds "name" "itlBucketsSeconds" "edges" .Values.sglang.itlBucketsSeconds) }}
{{- $source := dict "url" (printf "http://127.0.0.1:%v" .Values.sglang.port) | merge (default dict $config.source) }}
{{- $http := dict "host" "0.0.0.0" "port" .Values.controller.metricsPort }}
{{- $own := dict "table" (include "sglang-alloc.tablePath" .) "slo" $slo "source" $source "http" $http }}
{{- toYaml (mustMergeOverwrite $config $own) }}
{{- end }}

{{/* An SLO between two buckets cannot be measured: refuse it before anything is installed. */}}
{{- define "sglang-alloc.requireEdge" -}}
{{- if not (kindIs "invalid" .value) }}
{{- $found := false }}
{{- range .edges }}
{{- if eq (float64 .) (float64 $.value) }}{{ $found = true }}{{ end }}
{{- end }}
{{- if not $found }}
{{- fail (printf "controller.config.slo.%s is %v, which is not an edge of sglang.%s %v: add it there" .slo .value .name .edges) }}
{{- end }}
{{- end }}
{{- end }}
