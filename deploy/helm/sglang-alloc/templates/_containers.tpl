{{/* 1. Publish the table into the shared volume, then exit: SGLang refuses to start without it. */}}
{{- define "sglang-alloc.publishContainer" -}}
- name: publish-table
  image: {{ include "sglang-alloc.image" (dict "image" .Values.controller.image "appVersion" .Chart.AppVersion) }}
  imagePullPolicy: {{ .Values.controller.image.pullPolicy }}
  command: [sglang-alloc, publish]
  args:
    - {{ printf "%s/%s" .Values.budgetTables.mountPath .Values.budgetTables.fileName }}
    - --shared-path
    - {{ include "sglang-alloc.tablePath" . }}
    {{- with .Values.worker.mode }}
    - --mode
    - {{ . }}
    {{- end }}
  securityContext:
    {{- include "sglang-alloc.containerSecurityContext" . | nindent 4 }}
  resources:
    {{- toYaml .Values.controller.resources | nindent 4 }}
  volumeMounts:
    - name: budget-tables
      mountPath: {{ .Values.budgetTables.mountPath }}
      readOnly: true
    - name: shared-table
      mountPath: {{ .Values.sharedTable.mountPath }}
{{- end }}

{{/*
2. The controller, a native sidecar: it starts before SGLang and stops after it. SGLang serves at its
fallback without it, so it must neither hold up SGLang's start (no startup probe: SGLang would wait
for it) nor take the pod out of its Service, of which a sidecar that has ended or fails a readiness
probe is enough. So it stays and retries when it refuses to work, and no probe restarts it.
*/}}
{{- define "sglang-alloc.controllerContainer" -}}
- name: controller
  image: {{ include "sglang-alloc.image" (dict "image" .Values.controller.image "appVersion" .Chart.AppVersion) }}
  imagePullPolicy: {{ .Values.controller.image.pullPolicy }}
  restartPolicy: Always
  command: [sglang-alloc-controller, run]
  args:
    - --config
    - /etc/sglang-alloc/controller.yaml
    - --retry-seconds
    - "10"
  env: # the table: for `sglang-alloc status` and `set`, run inside the container
    - name: SGLANG_ALLOC_TABLE
      value: {{ include "sglang-alloc.tablePath" . }}
    {{- with .Values.controller.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - name: ctrl-metrics
      containerPort: {{ .Values.controller.metricsPort }}
      protocol: TCP
  securityContext:
    {{- include "sglang-alloc.containerSecurityContext" . | nindent 4 }}
  resources:
    {{- toYaml .Values.controller.resources | nindent 4 }}
  volumeMounts:
    - name: controller-config
      mountPath: /etc/sglang-alloc
      readOnly: true
    - name: budget-tables
      mountPath: {{ .Values.budgetTables.mountPath }}
      readOnly: true
    {{- if .Values.controller.controlTokenSecret.name }}
    - name: control-token
      mountPath: {{ include "sglang-alloc.controlTokenFolder" . }}
      readOnly: true
    {{- end }}
    - name: shared-table
      mountPath: {{ .Values.sharedTable.mountPath }}
    - name: tmp
      mountPath: /tmp
    {{- with .Values.controller.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* 3. SGLang itself, started through `sglang-alloc serve`, which reads SGLANG_ALLOC_* and checks it all first. */}}
{{- define "sglang-alloc.sglangContainer" -}}
- name: sglang
  image: {{ include "sglang-alloc.image" (dict "image" .Values.sglang.image "appVersion" .Chart.AppVersion) }}
  imagePullPolicy: {{ .Values.sglang.image.pullPolicy }}
  command: [sglang-alloc, serve]
  args:
    - --
    - --model-path
    - {{ .Values.model.path }}
    - --served-model-name
    - {{ .Values.model.servedName }}
    - --host
    - 0.0.0.0
    - --port
    - {{ .Values.sglang.port | quote }}
    - --enable-metrics
    - --bucket-time-to-first-token
    {{- range .Values.sglang.ttftBucketsSeconds }}
    - {{ . | quote }}
    {{- end }}
    - --bucket-inter-token-latency
    {{- range .Values.sglang.itlBucketsSeconds }}
    - {{ . | quote }}
    {{- end }}
    {{- range .Values.sglang.extraArgs }}
    - {{ . | quote }}
    {{- end }}
  env:
    - name: SGLANG_ALLOC_TABLE
      value: {{ include "sglang-alloc.tablePath" . }}
    {{- with .Values.worker.mode }}
    - name: SGLANG_ALLOC_MODE
      value: {{ . }}
    {{- end }}
    - name: SGLANG_ALLOC_STALE_AFTER_SECONDS
      value: {{ .Values.worker.staleAfterSeconds | quote }}
    - name: SGLANG_ALLOC_FALLBACK
      value: {{ .Values.worker.fallback | quote }}
    - name: SGLANG_ALLOC_REQUEST_BUDGETS
      value: {{ .Values.worker.requestBudgets | quote }}
    {{- if ne .Values.worker.protectedPriority nil }}
    - name: SGLANG_ALLOC_PROTECTED_PRIORITY
      value: {{ .Values.worker.protectedPriority | quote }}
    {{- end }}
    {{- with .Values.worker.priorityFloors }}
    - name: SGLANG_ALLOC_PRIORITY_FLOORS
      value: {{ . | quote }}
    {{- end }}
    {{- if .Values.worker.correctDrift }}
    - name: SGLANG_ALLOC_CORRECT_DRIFT
      value: "1"
    {{- end }}
    {{- if ne .Values.worker.routing "engine" }}
    - name: SGLANG_ALLOC_ROUTING
      value: {{ .Values.worker.routing }}
    {{- end }}
    - name: HOME
      value: /cache
    - name: USER
      value: sglang
    - name: XDG_CACHE_HOME
      value: /cache
    - name: TRITON_CACHE_DIR
      value: /cache/triton
    - name: TORCHINDUCTOR_CACHE_DIR
      value: /cache/inductor
    {{- with .Values.sglang.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - name: http
      containerPort: {{ .Values.sglang.port }}
      protocol: TCP
  startupProbe:
    httpGet:
      path: /health
      port: http
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: {{ div (add .Values.sglang.startupSeconds 9) 10 }}
  readinessProbe:
    httpGet:
      path: /health
      port: http
    periodSeconds: 10
    timeoutSeconds: 5
  livenessProbe:
    httpGet:
      path: /health
      port: http
    periodSeconds: 20
    timeoutSeconds: 20
    failureThreshold: 6
  securityContext:
    {{- include "sglang-alloc.containerSecurityContext" . | nindent 4 }}
  resources:
    {{- toYaml .Values.sglang.resources | nindent 4 }}
  volumeMounts:
    - name: shared-table
      mountPath: {{ .Values.sharedTable.mountPath }}
    {{- if .Values.model.volume }}
    - name: model
      mountPath: {{ .Values.model.mountPath }}
      readOnly: true
    {{- end }}
    - name: engine-shm
      mountPath: /dev/shm
    - name: cache
      mountPath: /cache
    - name: tmp
      mountPath: /tmp
    {{- with .Values.sglang.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
