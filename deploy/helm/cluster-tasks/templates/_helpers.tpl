{{- define "cluster-tasks.name" -}}
{{- if contains "cluster-tasks" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-cluster-tasks{{ end }}
{{- end }}

{{/* Of (dict "root" $ "component" NAME): what selects the pods of a component. */}}
{{- define "cluster-tasks.labels" -}}
app.kubernetes.io/name: cluster-tasks
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Of (dict "root" $ "user" ID): what all pods have in common. */}}
{{- define "cluster-tasks.pod" -}}
# Else a Service named cluster or flower becomes variables that are taken for settings, such as CLUSTER_PORT.
enableServiceLinks: false
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user }}
  runAsGroup: {{ .user }}
  fsGroup: {{ .user }}
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "cluster-tasks.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "cluster-tasks.labels" . | nindent 8 }}
{{- end }}

{{/* What all containers of the image have in common. */}}
{{- define "cluster-tasks.container" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
envFrom:
  - configMapRef: {name: {{ include "cluster-tasks.name" . }}}
{{- with .Values.existingSecret }}
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end }}

{{/* Of (dict "root" $ "node" NAME): what asks for it. An app of one's own may set which cluster that is in. */}}
{{- define "cluster-tasks.ping" -}}
cluster-tasks, ping, --node, {{ .node }}{{ if ne .root.Values.app "cluster_tasks" }}, --app, {{ .root.Values.app }}{{ end }}
{{- end }}

{{/* Of the same: when it has started, and whether it is alive. A probe costs a second of a core, so it is seldom. */}}
{{- define "cluster-tasks.probes" -}}
startupProbe:
  exec: {command: [{{ include "cluster-tasks.ping" . }}]}
  periodSeconds: 5
  timeoutSeconds: 20
  failureThreshold: 24
livenessProbe:
  exec: {command: [{{ include "cluster-tasks.ping" . }}, --alive]}
  periodSeconds: 60
  timeoutSeconds: 20
  failureThreshold: 3
{{- end }}

{{- define "cluster-tasks.budget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "cluster-tasks.name" .root }}-{{ .component }}
  labels: {{ include "cluster-tasks.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels: {{ include "cluster-tasks.labels" . | nindent 6 }}
{{- end }}
