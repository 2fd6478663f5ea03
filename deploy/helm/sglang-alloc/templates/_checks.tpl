{{/*
Values that the schema lets pass one by one, and that are impossible together. Said here, before
anything is installed, rather than by a container that does not start.
*/}}
{{- define "sglang-alloc.checks" -}}
{{- range $name := list "ttftBucketsSeconds" "itlBucketsSeconds" }}
{{- include "sglang-alloc.requireAscending" (dict "name" $name "edges" (get $.Values.sglang $name)) }}
{{- end }}
{{- if and .Values.worker.correctDrift (not (has .Values.worker.mode (list "" "threshold"))) }}
{{- fail (printf "worker.correctDrift moves thresholds, but worker.mode is %s: use mode threshold, or leave it out" .Values.worker.mode) }}
{{- end }}
{{- if and .Values.worker.priorityFloors (ne .Values.worker.protectedPriority nil) }}
{{- fail (printf "worker.protectedPriority and worker.priorityFloors both say what a priority has at least: let the floors end with %v:full, and leave the other out" .Values.worker.protectedPriority) }}
{{- end }}
{{- with .Values.keda }}
{{- if .enabled }}
{{- if not .prometheusAddress }}
{{- fail "keda.enabled needs keda.prometheusAddress, for example http://prometheus-operated.monitoring.svc:9090" }}
{{- end }}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{- fail (printf "keda.minReplicas is %v, which is above keda.maxReplicas (%v)" .minReplicas .maxReplicas) }}
{{- end }}
{{- if not $.Values.controller.enabled }}
{{- fail "keda.enabled scales on the controller's saturation, but controller.enabled is false" }}
{{- end }}
{{- end }}
{{- end }}
{{- if .Values.controller.enabled }}
{{- if eq (int .Values.sglang.port) (int .Values.controller.metricsPort) }}
{{- fail (printf "sglang.port and controller.metricsPort are both %v, and the containers of a pod share its ports: choose another one" .Values.sglang.port) }}
{{- end }}
{{- include "sglang-alloc.checkConfig" .Values.controller.config }}
{{- end }}
{{- end }}

{{/* What the controller itself would refuse of controller.config. */}}
{{- define "sglang-alloc.checkConfig" -}}
{{- if and (eq .mode "fixed") (not .fixed) }}
{{- fail "controller.config.mode is fixed, which needs controller.config.fixed.prefill_budget and .decode_budget" }}
{{- end }}
{{- $source := default dict .source }}
{{- if and (eq (default "sglang" $source.kind) "prometheus") (not $source.url) }}
{{- fail "controller.config.source.kind is prometheus, which needs controller.config.source.url, for example http://prometheus:9090" }}
{{- end }}
{{- $poll := float64 (default 1.0 $source.poll_seconds) }}
{{- $stale := float64 (default 5.0 (default dict .freshness).stale_after_seconds) }}
{{- if ge $poll $stale }}
{{- fail (printf "controller.config.source.poll_seconds is %v and must be below controller.config.freshness.stale_after_seconds (%v): every reading would be stale before the next" $poll $stale) }}
{{- end }}
{{- $quality := default dict .quality }}
{{- range $phase := list "prefill" "decode" }}
{{- $floor := get $quality (printf "%s_floor_budget" $phase) }}
{{- $ceiling := get $quality (printf "%s_ceiling_budget" $phase) }}
{{- if and $floor $ceiling (gt (int $floor) (int $ceiling)) }}
{{- fail (printf "controller.config.quality.%s_floor_budget is %v, which is above %s_ceiling_budget (%v): no budget is left" $phase $floor $phase $ceiling) }}
{{- end }}
{{- end }}
{{- end }}

{{/* SGLang makes histograms of the edges, which have to go up. */}}
{{- define "sglang-alloc.requireAscending" -}}
{{- $last := 0.0 }}
{{- range .edges }}
{{- if le (float64 .) $last }}
{{- fail (printf "sglang.%s %v must go up from edge to edge, but %v follows %v" $.name $.edges . $last) }}
{{- end }}
{{- $last = float64 . }}
{{- end }}
{{- end }}

{{/* An SLO between two buckets cannot be measured. */}}
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
