# The optional job, once and on a schedule, the examples, and the combinations that are refused.

mock_provider "google" {
  mock_resource "google_service_account" {
    defaults = {
      name  = "projects/test-project/serviceAccounts/worker@test-project.iam.gserviceaccount.com"
      email = "worker@test-project.iam.gserviceaccount.com"
    }
  }
}

mock_provider "google-beta" {}

variables {
  project   = "test-project"
  image_tag = "abc1234"
}

run "once_on_tpu" {
  command = apply

  variables {
    job = {
      name         = "circles"
      target       = "tpu"
      machine_type = "ct5lp-hightpu-4t"
      accelerator  = "type:tpu-v5-lite-podslice;topology:2x2"
      zone         = "us-central1-a"
      prompts      = "gs://b/prompts.csv"
      output       = "gs://b/out"
    }
  }

  assert {
    condition     = length(google_cloud_scheduler_job.this) == 0
    error_message = "A job without a schedule is run once."
  }

  assert {
    condition = (
      google_dataflow_flex_template_job.this["circles"].machine_type == "ct5lp-hightpu-4t" &&
      google_dataflow_flex_template_job.this["circles"].sdk_container_image == output.sdk_container_image.tpu &&
      google_dataflow_flex_template_job.this["circles"].container_spec_gcs_path == output.template_file_gcs_location.tpu &&
      google_dataflow_flex_template_job.this["circles"].ip_configuration == "WORKER_IP_PRIVATE"
    )
    error_message = "The job must use the given machine, its target's image and template, and private addresses."
  }

  assert {
    condition = toset(google_dataflow_flex_template_job.this["circles"].additional_experiments) == toset([
      "no_use_multiple_sdk_containers", "worker_accelerator=type:tpu-v5-lite-podslice;topology:2x2",
    ])
    error_message = "The job must ask for the accelerator and for one process a worker."
  }

  assert {
    condition = google_dataflow_flex_template_job.this["circles"].parameters == tomap({
      prompts                          = "gs://b/prompts.csv"
      output                           = "gs://b/out"
      sdk_location                     = "container"
      worker_zone                      = "us-central1-a"
      disk_size_gb                     = "100"
      compilation_cache                = output.compilation_cache
      number_of_worker_harness_threads = "4"
    })
    error_message = "The job must pass prompts, output, zone, disk, compilation cache and threads to the pipeline."
  }
}

run "scheduled_on_l4" {
  command = apply

  variables {
    job = {
      name         = "nightly"
      target       = "cuda"
      machine_type = "g2-standard-8"
      accelerator  = "type:nvidia-l4;count:1;install-nvidia-driver"
      zone         = "us-central1-b"
      prompts      = "gs://b/prompts/*.parquet"
      output       = "gs://b/out"
      max_workers  = 4
      parameters   = { model = "gs://b/models/sd15", compilation_cache = "gs://b/cache", number_of_worker_harness_threads = "2", output = "gs://b/other" }
      schedule     = "0 2 * * *"
    }
  }

  assert {
    condition     = length(google_dataflow_flex_template_job.this) == 0
    error_message = "A scheduled job is not also run by the apply."
  }

  assert {
    condition     = contains(keys(google_project_service.this), "cloudscheduler.googleapis.com")
    error_message = "A schedule needs its service."
  }

  assert {
    condition = jsondecode(base64decode(google_cloud_scheduler_job.this["nightly"].http_target[0].body)).launchParameter == {
      jobName              = "nightly"
      containerSpecGcsPath = "gs://test-project-sdjax-staging/templates/abc1234/cuda.json"
      parameters = {
        model = "gs://b/models/sd15", prompts = "gs://b/prompts/*.parquet", output = "gs://b/out", sdk_location = "container"
        # The job's own, and not the defaults.
        compilation_cache = "gs://b/cache", number_of_worker_harness_threads = "2"
      }
      environment = {
        additionalExperiments = ["no_use_multiple_sdk_containers", "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"]
        additionalUserLabels  = { app = "sdjax" }
        diskSizeGb            = 100
        ipConfiguration       = "WORKER_IP_PRIVATE"
        machineType           = "g2-standard-8"
        maxWorkers            = 4
        numWorkers            = 1
        sdkContainerImage     = "us-central1-docker.pkg.dev/test-project/sdjax/sdjax-cuda:abc1234"
        serviceAccountEmail   = "worker@test-project.iam.gserviceaccount.com"
        stagingLocation       = "gs://test-project-sdjax-staging/staging"
        subnetwork            = "regions/us-central1/subnetworks/sdjax"
        tempLocation          = "gs://test-project-sdjax-staging/temp"
        workerZone            = "us-central1-b"
      }
    }
    error_message = "The schedule must post a whole launch request."
  }

  assert {
    condition     = one(google_cloud_scheduler_job.this["nightly"].http_target[0].oauth_token[*].scope) == "https://www.googleapis.com/auth/cloud-platform"
    error_message = "The schedule must sign in as the launcher."
  }
}

run "example_tpu_v5e" {
  command = apply

  module {
    source = "./examples/tpu-v5e"
  }

  assert {
    condition     = keys(output.sdjax.sdk_container_image) == ["tpu"]
    error_message = "The example needs the tpu image only."
  }
}

run "example_gpu_l4" {
  command = apply

  module {
    source = "./examples/gpu-l4"
  }

  variables {
    email = "ops@example.com"
  }

  assert {
    condition     = keys(output.sdjax.sdk_container_image) == ["cuda"]
    error_message = "The example needs the cuda image only."
  }
}

run "tpu_without_topology_is_refused" {
  command         = plan
  expect_failures = [var.job]

  variables {
    job = {
      name        = "circles", target = "tpu", machine_type = "ct5lp-hightpu-4t", zone = "us-central1-a"
      prompts     = "gs://b/p.csv", output = "gs://b/out"
      accelerator = "type:tpu-v5-lite-podslice"
    }
  }
}

run "gpu_without_driver_is_refused" {
  command         = plan
  expect_failures = [var.job]

  variables {
    job = {
      name        = "circles", target = "cuda", machine_type = "g2-standard-8", zone = "us-central1-a"
      prompts     = "gs://b/p.csv", output = "gs://b/out"
      accelerator = "type:nvidia-l4;count:1"
    }
  }
}

run "zone_elsewhere_is_refused" {
  command         = plan
  expect_failures = [var.job]

  variables {
    job = {
      name        = "circles", target = "tpu", machine_type = "ct5lp-hightpu-4t", zone = "us-west1-c"
      prompts     = "gs://b/p.csv", output = "gs://b/out"
      accelerator = "type:tpu-v5-lite-podslice;topology:2x2"
    }
  }
}
