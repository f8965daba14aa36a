{{- /* What every pod has, and what `restricted` asks of it: no account token, no root, nothing to write on but what it was given. */}}
{{- define "common.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.global.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 0 }}
{{- end }}
{{- end }}

{{- define "common.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Takes startSeconds, the longest start. One service name each on the plaintext health port; a server registers them before it loads. */}}
{{- define "common.probes" -}}
startupProbe:
  grpc: {port: 8081, service: startup}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: {{ ceil (divf .startSeconds 2) | int }}
readinessProbe:
  grpc: {port: 8081, service: ready}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 3
livenessProbe:
  grpc: {port: 8081, service: live}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{- /* Seconds from a pod's deletion to SIGKILL. Takes sleep (preStop, until nobody routes here any more) and longest (a call may take so
long). Between them lies the announcement, 5 s; behind them 10 s to close. */}}
{{- define "common.graceSeconds" -}}
{{- add .sleep 5 .longest 10 -}}
{{- end }}

{{- /* Where libraries write, all of it under /tmp. */}}
{{- define "common.cacheEnv" -}}
- {name: HOME, value: /tmp/home}
- {name: TMPDIR, value: /tmp}
- {name: XDG_CACHE_HOME, value: /tmp/cache}
- {name: XDG_CONFIG_HOME, value: /tmp/config}
- {name: XDG_DATA_HOME, value: /tmp/data}
- {name: HF_HOME, value: /tmp/huggingface}
- {name: TRITON_CACHE_DIR, value: /tmp/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /tmp/inductor}
{{- end }}

{{- /* The volume of a component's certificate, mounted at /etc/argosy/tls. Takes it. */}}
{{- define "common.tlsVolume" -}}
- name: tls
  secret: {secretName: {{ include "common.tlsSecret" . }}}
{{- end }}

{{- define "common.tlsMount" -}}
- {name: tls, mountPath: /etc/argosy/tls, readOnly: true}
{{- end }}

{{- /* The store, where it is a file system: a claim that everybody shares. Takes root. */}}
{{- define "common.storeVolume" -}}
{{- with .root.Values.global.store.existingClaim }}
- name: store
  persistentVolumeClaim: {claimName: {{ . }}}
{{- end }}
{{- end }}

{{- define "common.storeMount" -}}
{{- if .root.Values.global.store.existingClaim }}
- {name: store, mountPath: /store{{ if .readOnly }}, readOnly: true{{ end }}}
{{- end }}
{{- end }}
