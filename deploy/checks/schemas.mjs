// Holds Grafana dashboards to Grafana's own types, and custom resources of Kubernetes to their definitions' schemas.
//
//   node schemas.mjs MODULES < DOCUMENTS
//
// MODULES is the folder node_modules with what package.json names. DOCUMENTS is a JSON list of dashboards and of
// resources (told apart by their apiVersion). Prints a line for each fault; exits with 1 if there is any.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const modules = process.argv[2];
const require = createRequire(modules + "/");
const { createGenerator } = require("ts-json-schema-generator");
const Ajv = require("ajv").default;
const ajv = new Ajv({ strict: false, allErrors: true });

const compiled = {};
// No key is allowed that the type `name` of the declarations in `path` does not have.
function typeSchema(path, name) {
  const tsconfig = new URL("tsconfig.json", import.meta.url).pathname;
  const strict = { tsconfig, skipTypeCheck: true, additionalProperties: false };
  return (compiled[path + name] ??= ajv.compile(createGenerator({ path: `${modules}/${path}`, type: name, ...strict }).createSchema(name)));
}

const grafana = (file) => `@grafana/schema/dist/types/raw/${file}/x/types.gen.d.ts`;

function faults(where, schema, value) {
  if (schema(value)) return [];
  return schema.errors.map((e) => `${where}${e.instancePath}: ${e.message} ${JSON.stringify(e.params)}`);
}

function dashboardFaults(dashboard) {
  const found = faults("dashboard", typeSchema(grafana("dashboard"), "Dashboard"), dashboard);
  for (const panel of dashboard.panels.filter((p) => p.type !== "row")) {
    const file = grafana(`composable/${panel.type}/panelcfg`);
    found.push(...faults(`${panel.title}: options`, typeSchema(file, "Options"), panel.options));
    const custom = panel.fieldConfig.defaults.custom;
    if (custom) found.push(...faults(`${panel.title}: custom`, typeSchema(file, "FieldConfig"), custom));
    for (const query of panel.targets) {
      // Prometheus' query, of which the package has no type.
      const known = ["refId", "datasource", "editorMode", "expr", "legendFormat", "range", "instant", "format"];
      const unknown = Object.keys(query).filter((key) => !known.includes(key));
      if (unknown.length || !query.expr) found.push(`${panel.title}: query ${query.refId}: ${unknown}`);
    }
  }
  return found;
}

const packages = {
  "gateway.networking.k8s.io": "@kubernetes-models/gateway-api",
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
};

async function resourceFaults(resource) {
  const [group] = resource.apiVersion.split("/");
  const file = `${packages[group]}/${resource.apiVersion}/${resource.kind}`;
  const where = `${resource.kind} ${resource.metadata.name}`;
  const found = faults(where, typeSchema(file + ".d.ts", "I" + resource.kind), resource);
  const Model = (await import(pathToFileURL(`${modules}/${file}.js`)))[resource.kind];
  try {
    new Model(resource).validate();
  } catch (e) {
    found.push(`${where}: ${e.message}`);
  }
  return found;
}

let failed = false;
for (const document of JSON.parse(readFileSync(0))) {
  for (const fault of document.apiVersion ? await resourceFaults(document) : dashboardFaults(document)) {
    console.log(fault);
    failed = true;
  }
}
process.exit(failed ? 1 : 0);
